"""The command line: flags and their help, configuration files, recipes' shared parts, reports, errors as sentences."""
