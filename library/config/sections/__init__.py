"""The options, one dataclass a section. A field is the only place that declares its option."""
