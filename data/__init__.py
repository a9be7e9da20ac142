"""From text to training batches: tokenizer.py, shards.py (the format), prepare.py (sources -> shards), loader.py."""
