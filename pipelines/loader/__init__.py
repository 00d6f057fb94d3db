"""The data loader: threads, buffers, batches and bad samples."""
