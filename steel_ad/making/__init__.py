"""Data sets that the project makes: from video, with inserted defects, the thesis' five."""
