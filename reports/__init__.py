"""What a run leaves for people: metrics, transcripts, figures and a page."""
