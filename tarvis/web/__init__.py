"""The page: objects are pointed at in a video, followed, corrected and taken away.

app.py         addresses of the server, and who may use them
bodies.py      what browsers send, as values
sessions.py    a video that somebody works on, kept in a folder
store.py       the sessions of all people; uploads become sessions
processes.py   processes that decode and infer, and the queue before them
jobs.py        what these processes do
page/          what the browser gets: HTML, CSS and JavaScript modules, as they are
"""
