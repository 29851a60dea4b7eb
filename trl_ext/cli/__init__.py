"""The command line: flags and their help, configuration files, shared parts of recipes, reports, readable errors."""
