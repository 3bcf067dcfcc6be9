"""From folders of images to few-shot splits in Parquet, and from those to tensors."""
