"""Convert data sets from other tools' layouts to ours: YOLO, Pascal VOC, LabelMe, CVAT, and COCO files in others'
folders.
"""
