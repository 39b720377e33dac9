"""stub"""
FORMATS = {}
