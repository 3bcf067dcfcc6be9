"""Parameter-efficient tuning methods, one file each."""
