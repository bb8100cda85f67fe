"""The version, as a constant: importlib.metadata would cost the device 3.5 MB."""

__version__ = "0.1.0"
