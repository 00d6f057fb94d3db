"""Run this project's functions as tasks of an existing Ray cluster. The only user of Ray."""
