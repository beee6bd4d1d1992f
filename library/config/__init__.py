"""Options: one table of dataclass fields; TOML and command line; checks. Imports no torch."""
