"""One method a file, on torch alone. Every part that is defined here is registered as ``mmdyt.<Class>``."""
