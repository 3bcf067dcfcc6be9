"""Data: from image folders and tables to few-shot splits in Parquet, and on to tensors."""
