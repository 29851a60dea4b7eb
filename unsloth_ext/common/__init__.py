"""Code that several methods use: wrapping, adapters, loading, saving, attention taps, delimiters, generation arguments."""
