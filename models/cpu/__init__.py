"""What the CPU of this machine computes slowly or wrongly, and how models avoid it."""
