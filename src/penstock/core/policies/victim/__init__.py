"""Who gives memory back when the forecast was wrong?"""
