"""Model zoo of the tests: named architectures, one module per layer family, generated architectures, and data."""
