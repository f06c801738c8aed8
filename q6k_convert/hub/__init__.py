"""Files of the Hugging Face Hub by name. Imports nothing of the other rooms."""
