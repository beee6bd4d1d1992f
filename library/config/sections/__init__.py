"""The sections of the configuration, one frozen dataclass each."""
