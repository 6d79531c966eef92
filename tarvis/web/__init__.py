"""The page: objects are pointed at in a video, followed, corrected and taken away.

app.py         addresses of the server, and who may use them
sessions.py    videos that people work on, kept in folders
processes.py   processes that decode and infer, and the queue before them
jobs.py        what these processes do
page/          what the browser gets: HTML, CSS and JavaScript modules, as they are
"""
