"""Command-line tools: `bench` times and compiles the kernels, `errors` tabulates their errors."""
