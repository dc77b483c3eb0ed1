"""Data sets in other tools' layouts into ours: YOLO, Pascal VOC, LabelMe, CVAT, and COCO files in others' folders."""
