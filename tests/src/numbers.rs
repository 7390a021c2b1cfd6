//! Numbered datagrams, so that each that is lost is noticed; and a load of them on a router.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{SocketAddr, UdpSocket},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};

use crate::{
    daemon::LONG,
    netns::{Family, Netns, Routed},
    traffic,
};

/// What [`under_load`] sends that must arrive: TCP as well.
pub const ALLOWED: u16 = 7001;
/// What it sends that must not.
pub const FORBIDDEN: u16 = 7003;

/// A numbered datagram every now and then until `stop`; how many were sent.
pub fn send_numbers(from: &Netns, to: SocketAddr, stop: &AtomicBool) -> u32 {
    let socket = traffic::udp(from, (traffic::unspecified(to.ip()), 0), LONG);
    socket.connect(to).unwrap();
    let mut number: u32 = 0;
    while !stop.load(Ordering::Relaxed) {
        socket.send(&number.to_be_bytes()).unwrap();
        number += 1;
        thread::sleep(Duration::from_millis(1));
    }
    number
}

/// A receiver that a busy machine cannot make lose anything.
pub fn receiver(namespace: &Netns, at: SocketAddr) -> UdpSocket {
    let socket = traffic::udp(namespace, at, Duration::from_millis(20));
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
    socket
}

/// The next number, if one comes soon.
pub fn receive(socket: &UdpSocket) -> Option<u32> {
    let mut bytes = [0; 4];
    match socket.recv(&mut bytes) {
        Ok(4) => Some(u32::from_be_bytes(bytes)),
        Ok(length) => panic!("{length} bytes"),
        Err(_) => None,
    }
}

/// Receives until `stop` and then until it is quiet.
pub fn receive_numbers(socket: &UdpSocket, stop: &AtomicBool) -> Vec<u32> {
    let mut numbers = Vec::new();
    let mut last = Instant::now();
    loop {
        match receive(socket) {
            Some(number) => {
                numbers.push(number);
                last = Instant::now();
            }
            None if stop.load(Ordering::Relaxed) && last.elapsed() > Duration::from_millis(500) => {
                return numbers;
            }
            None => {}
        }
    }
}

/// How much a load was.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Datagrams that had to arrive, and did.
    pub delivered: u64,
    /// Datagrams that had not to, and did not.
    pub in_vain: u64,
    /// Questions and answers of the TCP session.
    pub rounds: u64,
}

/// Does `work` [`under_measured_load`].
pub fn under_load<T>(net: &Routed, work: impl FnOnce() -> T) -> T {
    under_measured_load(net, work).0
}

/// Does `work` while datagrams and a TCP session go from one network to the other that the policy
/// allows at port [`ALLOWED`], and some that it denies at [`FORBIDDEN`]. Not one of the former may be
/// lost, not one of the latter delivered.
pub fn under_measured_load<T>(net: &Routed, work: impl FnOnce() -> T) -> (T, Load) {
    let at = |family: Family, port| SocketAddr::new(family.address(2, 2), port);
    traffic::tcp_echo(&net.b, ALLOWED);
    let sockets = |port| Family::BOTH.map(|family| receiver(&net.b, at(family, port)));
    let (wanted, unwanted) = (sockets(ALLOWED), sockets(FORBIDDEN));
    let mut stream = traffic::tcp(&net.a, at(Family::V6, ALLOWED));
    let (stop, ended) = (&AtomicBool::new(false), &AtomicBool::new(false));
    thread::scope(|scope| {
        let send = |to| scope.spawn(move || send_numbers(&net.a, to, stop));
        let sent =
            [ALLOWED, FORBIDDEN].map(|port| Family::BOTH.map(|family| send(at(family, port))));
        let got = [&wanted, &unwanted].map(|sockets| {
            sockets
                .each_ref()
                .map(|socket| scope.spawn(move || receive_numbers(socket, ended)))
        });
        let talk = scope.spawn(move || {
            let mut rounds: u32 = 0;
            while !stop.load(Ordering::Relaxed) {
                let words = rounds.to_be_bytes().repeat(200);
                stream.write_all(&words).unwrap();
                let mut answer = vec![0; words.len()];
                stream.read_exact(&mut answer).unwrap();
                assert_eq!(answer, words);
                rounds += 1;
                thread::sleep(Duration::from_millis(1));
            }
            rounds
        });
        let done = catch_unwind(AssertUnwindSafe(work));
        // In any case: threads would go on for ever.
        stop.store(true, Ordering::Relaxed);
        let rounds = talk.join();
        let sent = sent.map(|family| family.map(|thread| thread.join()));
        ended.store(true, Ordering::Relaxed);
        let [delivered, leaked] = got.map(|family| family.map(|thread| thread.join()));
        let done = done.unwrap_or_else(|panic| resume_unwind(panic));
        let rounds = rounds.unwrap();
        assert!(rounds > 0, "the TCP session went on");
        let mut load = Load {
            delivered: 0,
            in_vain: 0,
            rounds: rounds.into(),
        };
        let [sent, in_vain] = sent;
        for (sent, got) in sent.into_iter().zip(delivered) {
            let got: BTreeSet<u32> = got.unwrap().into_iter().collect();
            let sent = sent.unwrap();
            let lost: Vec<u32> = (0..sent).filter(|n| !got.contains(n)).collect();
            assert!(lost.is_empty(), "of {sent} these were lost: {lost:?}");
            load.delivered += u64::from(sent);
        }
        for (sent, got) in in_vain.into_iter().zip(leaked) {
            let sent = sent.unwrap();
            assert!(sent > 0);
            assert_eq!(got.unwrap(), [0; 0], "passed");
            load.in_vain += u64::from(sent);
        }
        (done, load)
    })
}
