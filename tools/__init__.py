"""Write the generated parts of the documentation."""
