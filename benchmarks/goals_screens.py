UNITS=[]; ROWS=[]
