"""Why a row was selected, where it came from, what came out."""
