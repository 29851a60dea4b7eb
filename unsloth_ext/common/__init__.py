"""What several methods use: wrapping, adapters, loading, saving, the attention tap, the delimiter, generate's arguments."""
