"""What `edgeadapt demo` shows: a small model that reads handwritten digits while the camera's picture goes bad, with and without adaptation."""
