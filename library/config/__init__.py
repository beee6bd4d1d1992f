"""What the user asked for, as one frozen value: options, files, checks. Imports no torch.

`load.load_config` reads it, `datasets.resolve_datasets` adds the data, `train_config.OPTIONS` is the table.
"""
