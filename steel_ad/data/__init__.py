"""Images in: folders, procedural plates, random patches."""
