//! Bytes a second over one TCP connection through the gateway.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};

use super::router::Router;
use crate::{daemon::LONG, netns::Family};

/// What one write or read takes.
const CHUNK: usize = 256 << 10;
/// Until the window has opened.
const WARM_UP: Duration = Duration::from_millis(100);

/// Gigabits a second from the left to the right.
pub fn throughput(router: &Router, family: Family, time: Duration) -> f64 {
    let flow = Router::real(family);
    let to = SocketAddr::new(flow.destination, flow.destination_port);
    let listener = router.wire.b.enter(|| TcpListener::bind(to).unwrap());
    let stream = router.wire.a.enter(|| {
        let kind = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        let stream = socket(kind, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let from = SocketAddr::new(flow.source, 0);
        bind(stream.as_raw_fd(), &SockaddrStorage::from(from)).unwrap();
        // Also how long a connection attempt lasts.
        let limit = nix::sys::time::TimeVal::new(i64::try_from(LONG.as_secs()).unwrap(), 0);
        setsockopt(&stream, sockopt::SendTimeout, &limit).unwrap();
        connect(stream.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
        TcpStream::from(stream)
    });
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = vec![0; CHUNK];
            let mut read_for = |time: Duration| {
                let (start, mut total) = (Instant::now(), 0);
                while start.elapsed() < time {
                    match stream.read(&mut bytes).unwrap() {
                        0 => panic!("the sender went away"),
                        length => total += length,
                    }
                }
                total as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9
            };
            read_for(WARM_UP);
            read_for(time)
        });
        let mut stream = stream;
        let bytes = vec![0; CHUNK];
        // Until the reader has seen enough and closes.
        while stream.write_all(&bytes).is_ok() {}
        reader.join().unwrap()
    })
}
