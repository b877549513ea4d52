"""What a study will take, from measurements or data sheets, and what it took."""
