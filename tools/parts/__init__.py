"""What the commands in tools/ are made of; the commands themselves are the files beside this folder."""
