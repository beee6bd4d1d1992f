"""Samples: records, captions, images, buckets, the plan of an epoch, batches."""
