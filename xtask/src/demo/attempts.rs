//! Who tries to reach whom, what the policy says about it, and what happened.

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::topology::{self, APP, DB, Family, GATEWAY, GUEST, Host, INTERNET, LAB};

/// How long silence must last to count as a dropped packet.
const SILENCE: Duration = Duration::from_millis(700);
/// How long an answer that is expected may take: a busy machine must not fail the demo.
const PATIENCE: Duration = Duration::from_secs(4);

/// What the policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    Deny,
}

/// What is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    Tcp(u16),
    Udp(u16),
    Ping,
}

/// Where an attempt starts.
#[derive(Debug, Clone, Copy)]
pub enum Source {
    Host(Host),
    /// The machine that runs the enforcer.
    Gateway,
}

/// One line of the table.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    pub from: Source,
    pub to: Host,
    pub family: Family,
    pub service: Service,
    pub expected: Verdict,
}

/// What happened to an attempt.
#[derive(Debug)]
pub enum Outcome {
    /// The server, or the address, answered.
    Answered(Duration),
    /// The packet arrived, but nobody serves that port.
    Refused,
    /// Nothing came back.
    TimedOut,
    /// The kernel refused the system call (EPERM).
    Prohibited,
    /// Anything else: the demo itself is at fault.
    Failed(String),
}

const fn line(
    from: Host,
    to: Host,
    family: Family,
    service: Service,
    expected: Verdict,
) -> Attempt {
    Attempt {
        from: Source::Host(from),
        to,
        family,
        service,
        expected,
    }
}

/// Written down by hand from `segments/hospital.yaml`, so that it checks the enforcer's reading.
pub const TABLE: [Attempt; 20] = {
    use Family::{V4, V6};
    use Service::{Ping, Tcp, Udp};
    use Verdict::{Allow, Deny};
    [
        line(APP, DB, V4, Tcp(5432), Allow),
        line(APP, DB, V6, Tcp(5432), Allow),
        line(APP, DB, V4, Ping, Allow),
        line(APP, DB, V6, Ping, Allow),
        line(LAB, APP, V4, Tcp(2575), Allow),
        line(LAB, APP, V6, Tcp(2575), Allow),
        line(GUEST, INTERNET, V4, Tcp(443), Allow),
        line(GUEST, INTERNET, V6, Tcp(443), Allow),
        line(GUEST, INTERNET, V4, Udp(53), Allow),
        line(GUEST, INTERNET, V6, Udp(53), Allow),
        line(GUEST, DB, V4, Tcp(5432), Deny),
        line(GUEST, DB, V6, Tcp(5432), Deny),
        line(GUEST, DB, V4, Ping, Deny),
        line(GUEST, APP, V6, Ping, Deny),
        line(APP, DB, V4, Tcp(22), Deny),
        line(LAB, DB, V6, Tcp(5432), Deny),
        line(LAB, INTERNET, V4, Udp(53), Deny),
        line(INTERNET, APP, V6, Tcp(2575), Deny),
        // The rule lab-results speaks of who opens the flow, and the database is not the lab.
        line(DB, APP, V4, Tcp(2575), Deny),
        Attempt {
            from: Source::Gateway,
            to: DB,
            family: V4,
            service: Tcp(22),
            expected: Deny,
        },
    ]
};

impl Attempt {
    /// True when what happened is what the policy says.
    pub fn went_as_expected(&self, outcome: &Outcome) -> bool {
        match self.expected {
            Verdict::Allow => matches!(outcome, Outcome::Answered(_)),
            Verdict::Deny => matches!(outcome, Outcome::TimedOut | Outcome::Prohibited),
        }
    }

    /// True when a line of `enforcer denials` speaks of this attempt.
    pub fn is_reported_by(&self, denial: &str) -> Result<bool> {
        let to = self.to.address(self.family)?;
        let mut words = vec![match self.service {
            Service::Tcp(port) | Service::Udp(port) => socket_text(to, port),
            Service::Ping => to.to_string(),
        }];
        if let Source::Host(host) = self.from {
            words.push(host.address(self.family)?.to_string());
        }
        Ok(denial.contains("DENIED") && words.iter().all(|word| denial.contains(word.as_str())))
    }

    fn try_it(&self) -> Result<Outcome> {
        let address = self.to.address(self.family)?;
        let name = match self.from {
            Source::Host(host) => host.name,
            Source::Gateway => GATEWAY,
        };
        let wait = match self.expected {
            Verdict::Allow => PATIENCE,
            Verdict::Deny => SILENCE,
        };
        let start = Instant::now();
        let result = topology::inside(name, || match self.service {
            Service::Tcp(port) => tcp((address, port).into(), wait),
            Service::Udp(port) => udp((address, port).into(), wait),
            Service::Ping => ping(address, wait),
        })?;
        Ok(match result {
            Ok(()) => Outcome::Answered(start.elapsed()),
            Err(error) => Outcome::from_error(&error),
        })
    }
}

/// Tries everything at once; outcomes in the order of `attempts`.
pub fn run(attempts: &[Attempt]) -> Result<Vec<Outcome>> {
    thread::scope(|scope| {
        let threads: Vec<_> = attempts
            .iter()
            .map(|attempt| scope.spawn(|| attempt.try_it()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("an attempt panicked"))?)
            .collect()
    })
}

impl Outcome {
    fn from_error(error: &io::Error) -> Self {
        if error.raw_os_error() == Some(nix::libc::EPERM) {
            return Self::Prohibited;
        }
        let kind = error.kind();
        if kind == ErrorKind::ConnectionRefused {
            Self::Refused
        } else if matches!(kind, ErrorKind::TimedOut | ErrorKind::WouldBlock) {
            Self::TimedOut
        } else {
            Self::Failed(error.to_string())
        }
    }
}

fn tcp(to: SocketAddr, wait: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, wait)?;
    stream.set_read_timeout(Some(wait))?;
    // The greeting: data came through, not only a handshake.
    match stream.read(&mut [0; 64])? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

fn udp(to: SocketAddr, wait: Duration) -> io::Result<()> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    ask(&socket, b"query", wait, |_| true)
}

/// One echo request over a ping socket; the kernel fills in identifier and checksum.
fn ping(to: IpAddr, wait: Duration) -> io::Result<()> {
    let (family, protocol, request, reply) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
    };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    let socket = UdpSocket::from(fd);
    socket.connect((to, 0))?;
    ask(
        &socket,
        &[request, 0, 0, 0, 0, 0, 0, 1, b'p'],
        wait,
        |kind| kind == reply,
    )
}

fn ask(
    socket: &UdpSocket,
    question: &[u8],
    wait: Duration,
    is_answer: impl Fn(u8) -> bool,
) -> io::Result<()> {
    socket.set_read_timeout(Some(wait))?;
    socket.send(question)?;
    let mut packet = [0; 64];
    match socket.recv(&mut packet)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ if is_answer(packet[0]) => Ok(()),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

fn socket_text(address: IpAddr, port: u16) -> String {
    SocketAddr::from((address, port)).to_string()
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Host(host) => host.name,
            Self::Gateway => GATEWAY,
        })
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(port) => f.pad(&format!("tcp/{port}")),
            Self::Udp(port) => f.pad(&format!("udp/{port}")),
            Self::Ping => f.pad("ping"),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(after) => f.pad(&format!(
                "answered in {:.1} ms",
                after.as_secs_f32() * 1000.0
            )),
            Self::Refused => f.pad("refused by the other end"),
            Self::TimedOut => f.pad("timed out"),
            Self::Prohibited => f.pad("refused by the kernel (EPERM)"),
            Self::Failed(reason) => f.pad(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_is_matched_to_its_attempt_only() {
        let guest = line(GUEST, DB, Family::V4, Service::Tcp(5432), Verdict::Deny);
        let text = "12:04:31.207 DENIED  guest-wifi 10.99.3.4:51514 -> ehr-db 10.10.1.5:5432 tcp";
        assert!(guest.is_reported_by(text).unwrap());
        assert!(
            !guest
                .is_reported_by(&text.replace("DENIED", "WOULD_DENY"))
                .unwrap()
        );
        assert!(
            !guest
                .is_reported_by(&text.replace("10.10.1.5", "10.10.1.6"))
                .unwrap()
        );
        let v6 = line(GUEST, DB, Family::V6, Service::Tcp(5432), Verdict::Deny);
        assert!(!v6.is_reported_by(text).unwrap());
        let text = "x DENIED  guest-wifi [fd00:99::4]:51514 -> ehr-db [fd00:10:1::5]:5432 tcp SYN";
        assert!(v6.is_reported_by(text).unwrap());
    }

    #[test]
    fn silence_is_a_denial_and_a_refusal_from_the_far_end_is_none() {
        let denied = line(GUEST, DB, Family::V4, Service::Ping, Verdict::Deny);
        let allowed = line(APP, DB, Family::V4, Service::Ping, Verdict::Allow);
        let answered = Outcome::Answered(Duration::from_millis(1));
        assert!(denied.went_as_expected(&Outcome::TimedOut));
        assert!(denied.went_as_expected(&Outcome::Prohibited));
        assert!(!denied.went_as_expected(&Outcome::Refused));
        assert!(!denied.went_as_expected(&answered));
        assert!(allowed.went_as_expected(&answered));
        assert!(!allowed.went_as_expected(&Outcome::TimedOut));
    }
}
