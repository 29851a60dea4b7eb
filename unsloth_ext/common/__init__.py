"""Code that several methods use: wrapping, adapters, loading, saving, attention taps, generation arguments."""
