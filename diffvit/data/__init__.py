"""Images from their sources to batches: loaders, decoding, the cache of decoded images, splits, noise."""
