"""bitgrain: smaller, faster models in formats that engines already read, with the evidence of what it cost."""
