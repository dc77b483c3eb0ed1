"""COCO annotation files as people write them, read once and checked, one file a noun: the document's tables and their
ids, the pictures, the segmentations, and the report of what was repaired, left out or refused.
"""
