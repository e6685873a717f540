"""Local servers in place of S3 and Google Cloud Storage."""

import contextlib
import logging
import os
import socket
import urllib.request

import fsspec
import gcp_storage_emulator.server
import moto.server


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def exact(read, decode):
    """The emulator's reader of uploads, without its fault: of content that ends in a carriage return it loses that byte."""

    def read_exactly(request, query):
        out = read(request, query)
        if isinstance(out, dict) and {"meta", "content"} <= out.keys():
            body = decode(request.body, request)
            boundary = b"\n--" + request.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            out["content"] = body[: body.rindex(boundary)].split(boundary, 1)[1].partition(b"\n\n")[2]
        return out

    return read_exactly


def keeping(read):
    def read_raw(request):
        request.body = read(request)
        return request.body

    return read_raw


@contextlib.contextmanager
def servers():
    """Runs both, each with an empty bucket `bucket`; yields the environment variables that make clients use them."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    s3 = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    port, emulator = free_port(), gcp_storage_emulator.server
    if emulator._read_data.__name__ != "read_exactly":
        emulator._read_data = exact(emulator._read_data, emulator._decode_raw_data)
        emulator._read_raw_data = keeping(emulator._read_raw_data)
    gs = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    s3.start()
    gs.start()
    variables = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*s3.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # here, what fails once fails again
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind of bucket it is
    }
    before = {name: os.environ.get(name) for name in variables}
    try:
        os.environ |= variables
        reset = urllib.request.Request(f"{variables['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()  # moto keeps the objects of an earlier server in this process
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another test's server
        fsspec.filesystem("s3").mkdir("bucket")
        yield variables
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        s3.stop()
        gs.stop()


def names(pattern: str) -> list[str]:
    """The objects that match `pattern`, such as s3://bucket/run/*."""
    return fsspec.filesystem(pattern.partition("://")[0], use_listings_cache=False).glob(pattern)
