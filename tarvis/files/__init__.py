"""File formats: JSON, pictures, run-length codes, files that are whole or absent."""
