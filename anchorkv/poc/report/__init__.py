"""The report: one self-contained page of what a proof of concept found (`html.write`)."""
