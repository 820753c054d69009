"""An S3 server on loopback that counts the bytes it hands out; run as a process: `counting_s3.py PORT_FILE`.

`GET /-/bytes` answers with the bytes of Parquet files sent so far, and starts again from 0.
"""

import sys
from pathlib import Path

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class Counter:
    def __init__(self, app):
        self.app = app
        self.num_bytes = 0

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/-/bytes":
            text = str(self.num_bytes).encode()
            self.num_bytes = 0
            start_response("200 OK", [("Content-Length", str(len(text)))])
            return [text]
        body = b"".join(self.app(environ, start_response))
        if environ["REQUEST_METHOD"] == "GET" and path.endswith(".parquet"):
            self.num_bytes += len(body)
        return [body]


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Counter(DomainDispatcherApplication(create_backend_app)), threaded=True)
    Path(sys.argv[1]).write_text(str(server.port))
    server.serve_forever()
