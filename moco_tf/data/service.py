"""Other processes that make views, for hosts that cannot decode fast enough: a `tf.data` service."""

import signal
import socket
import threading

import tensorflow as tf

from moco_tf.errors import UsageError

SCHEME = "grpc://"
ROLES = ("dispatcher", "worker")


class DataService:
    """A running service.

    Args:
        address: of its dispatcher, "grpc://HOST:PORT".
        job: a name that all hosts of a run give, and no other start of a run.

    Raises:
        UsageError: an address of another form.
    """

    def __init__(self, address, job):
        if not address.startswith(SCHEME) or not address.rpartition(":")[2].isdigit():
            raise UsageError(f"--data_service is a dispatcher's address, {SCHEME}HOST:PORT. Received: {address!r}. "
                             "`moco-tf data serve --role=dispatcher` prints it.")
        self.address, self.job = address, job

    def distribute(self, dataset):
        """The same elements, from the service: of each of the dataset's splits once, in any order of the splits; what a
        worker had begun when it died is left out."""
        service = tf.data.experimental.service
        # Snappy finds little to compress in views, and takes longer than a fast network.
        return dataset.apply(service.distribute(service.ShardingPolicy.DYNAMIC, self.address, job_name=self.job,
                                                compression=None))


def serve(role, port, dispatcher="", host=""):
    """Runs a part of a service until a signal asks it to end.

    Args:
        role: "dispatcher", of which there is one; "worker", which reads and makes views.
        port: to listen on.
        dispatcher: "grpc://HOST:PORT" or "HOST:PORT", for a worker.
        host: the name by which the others reach this machine; "": its own.

    Raises:
        UsageError: an unknown role; a worker without a dispatcher; a port that cannot be had.
    """
    if role not in ROLES:
        raise UsageError(f"--role must be one of {', '.join(ROLES)}. Received: {role!r}.")
    if bool(dispatcher) != (role == "worker"):
        raise UsageError("A worker needs --dispatcher=HOST:PORT, and a dispatcher none. Received: "
                         f"--role={role} --dispatcher={dispatcher}.")
    service, host, stopped = tf.data.experimental.service, host or socket.gethostname(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        if role == "dispatcher":
            server = service.DispatchServer(service.DispatcherConfig(port=port))
        else:
            address = dispatcher[len(SCHEME):] if dispatcher.startswith(SCHEME) else dispatcher
            server = service.WorkerServer(service.WorkerConfig(address, worker_address=f"{host}:{port}", port=port))
    except (tf.errors.OpError, RuntimeError) as error:
        raise UsageError(f"The {role} must be able to listen on port {port}, and a worker to reach its dispatcher. "
                         f"Received: {str(error).splitlines()[0]}.") from None
    told = f"train with --data_service={SCHEME}{host}:{port}" if role == "dispatcher" else f"works for {dispatcher}"
    print(f"{role} on port {port}: {told}", flush=True)
    stopped.wait()
    del server
    print(f"{role} stopped", flush=True)
