"""Read and check COCO annotation files as they occur in practice. One file per concept: the document's tables and their
ids, the pictures, the segmentations, and the report of what was repaired, left out or rejected.
"""
