"""The report of a run: one page of HTML and a page of Markdown, from the files that the stages wrote."""
