from plain_method import Reference

REFERENCE = Reference(starts=lambda towers, model: {}, changes_texts=False, random_start=False)
