"""Files on disk: whole writes, safetensors, hashes, metadata."""
