//! A page for a program of this machine: HTTP as far as a scraper of metrics needs it, on loopback or a socket.
//!
//! Invariants:
//! * nobody beyond this machine is answered: an address that is not loopback is refused, and so is a request that names
//!   another host, as a browser sends it that was told a wrong address;
//! * no client can make the mount wait: each has a thread of its own, a bounded number of them, a bounded request, and one
//!   deadline for all of it;
//! * one page, `/metrics`, which is made for each request; nothing can be changed.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::runtime::{Connection, ConnectionLimits, Listener};

use super::own_socket::Unbound;

/// A client has one deadline for everything.
const LIMITS: ConnectionLimits = ConnectionLimits { name: "metrics", most: 8, deadline: Duration::from_secs(5) };
/// Bytes of a request at most.
const MAX_REQUEST: usize = 8192;
const PAGE: &str = "/metrics";
/// The text format that is answered with.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where a page is: `unix:PATH`, `127.0.0.1:PORT` or `[::1]:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket of mode 0600.
    Unix(PathBuf),
    /// A loopback address; port 0 is one that the kernel chooses.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORMS: &str = "give unix:PATH, 127.0.0.1:PORT or [::1]:PORT";
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(FORMS) } else { Ok(Self::Unix(PathBuf::from(path))) };
        }
        let address: SocketAddr = text.parse().map_err(|_| FORMS)?;
        if address.ip().is_loopback() {
            return Ok(Self::Tcp(address));
        }
        Err("only this machine may read metrics: give a loopback address (127.0.0.1:PORT, [::1]:PORT) or unix:PATH")
    }
}

/// A place where a page will be; given up if dropped.
pub struct Bound {
    /// `None` only once it is served.
    socket: Option<OwnedFd>,
    /// Where it is.
    pub address: Address,
}

impl Bound {
    /// Takes the place. A socket that a dead process left is replaced.
    ///
    /// # Errors
    /// Those of the system; `AddrInUse` if somebody listens there.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let path = std::path::absolute(path)?;
                make_way(&path)?;
                let socket = Unbound::new()?.listen_at(&path)?;
                Ok(Self { socket: Some(socket.into()), address: Address::Unix(path) })
            }
            Address::Tcp(wanted) => {
                let socket = TcpListener::bind(wanted)?;
                let address = Address::Tcp(socket.local_addr()?);
                Ok(Self { socket: Some(socket.into()), address })
            }
        }
    }

    /// Answers from now on with what `page` makes.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn serve(mut self, page: impl Fn() -> String + Send + Sync + 'static) -> io::Result<Server> {
        // A client that breaks off harms only itself.
        let serve = move |mut client| drop(answer(&mut client, &page));
        let listener = self.socket.take().map(|socket| Listener::start(socket, LIMITS, serve)).transpose()?;
        Ok(Server { _listener: listener, address: self.address.clone() })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if self.socket.is_some() {
            self.address.give_up();
        }
    }
}

impl Address {
    /// Leaves no socket behind.
    fn give_up(&self) {
        if let Self::Unix(path) = self {
            let _ = fs::remove_file(path);
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Removes a socket that nobody listens on.
fn make_way(path: &std::path::Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(found) if found.file_type().is_socket() && UnixStream::connect(path).is_err() => fs::remove_file(path),
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
    }
}

/// A page that is there; gone when dropped.
pub struct Server {
    _listener: Option<Listener>,
    address: Address,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.address.give_up();
    }
}

fn answer(client: &mut Connection, page: &impl Fn() -> String) -> io::Result<()> {
    let request = read_request(client)?;
    client.has_asked();
    let (status, head_only) = judge(&request);
    let (content_type, body) = match status {
        OK => (CONTENT_TYPE, page()),
        other => ("text/plain; charset=utf-8", format!("{other}\n")),
    };
    let length = body.len();
    let mut text = format!(
        "HTTP/1.0 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    if !head_only {
        text.push_str(&body);
    }
    client.write_all(text.as_bytes())
}

const OK: &str = "200 OK";

/// The status of the answer, and whether only its head is wanted.
fn judge(request: &[u8]) -> (&'static str, bool) {
    let text = String::from_utf8_lossy(request);
    let mut lines = text.lines();
    let words: Vec<_> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else { return ("400 Bad Request", false) };
    let host = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("host").then(|| value.trim().to_owned())
    });
    let status = match (method, target.split('?').next()) {
        _ if !version.starts_with("HTTP/1.") => "400 Bad Request",
        _ if host.is_some_and(|host| !is_this_machine(&host)) => "403 Forbidden",
        ("GET" | "HEAD", Some(PAGE)) => OK,
        ("GET" | "HEAD", _) => "404 Not Found",
        _ => "405 Method Not Allowed",
    };
    (status, method == "HEAD")
}

/// Whether a `Host` names this machine, with or without a port. One that is empty names nothing.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let is_loopback = name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    name.is_empty() || name.eq_ignore_ascii_case("localhost") || is_loopback
}

fn read_request(client: &mut Connection) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && !request.windows(2).any(|end| end == b"\n\n") {
        let len = client.read(&mut part)?;
        request.extend_from_slice(&part[..len]);
        if len == 0 || request.len() > MAX_REQUEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    fn ask(address: &Address, request: &str) -> String {
        let mut answer = String::new();
        match address {
            Address::Unix(path) => {
                let mut stream = UnixStream::connect(path).unwrap();
                let _ = stream.write_all(request.as_bytes());
                let _ = stream.read_to_string(&mut answer);
            }
            Address::Tcp(address) => {
                let mut stream = TcpStream::connect(address).unwrap();
                let _ = stream.write_all(request.as_bytes());
                let _ = stream.read_to_string(&mut answer);
            }
        }
        answer
    }

    #[test]
    fn only_this_machine_has_addresses() {
        for good in ["127.0.0.1:9100", "127.1.2.3:1", "[::1]:0", "unix:/run/x"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in ["0.0.0.0:9100", "[::]:9100", "10.0.0.1:80", "localhost:80", "127.0.0.1", "unix:", "9100", ""] {
            bad.parse::<Address>().unwrap_err();
        }
    }

    #[test]
    fn one_page_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        for address in [Address::Unix(path.clone()), "127.0.0.1:0".parse().unwrap()] {
            let bound = Bound::bind(&address).unwrap();
            let address = bound.address.clone();
            assert_eq!(Bound::bind(&address).err().unwrap().kind(), io::ErrorKind::AddrInUse);
            let _server = bound.serve(|| "the page".to_owned()).unwrap();
            let good = ask(&address, "GET /metrics HTTP/1.1\r\nHost: localhost:80\r\n\r\n");
            assert!(good.starts_with("HTTP/1.0 200 OK\r\n") && good.ends_with("\r\n\r\nthe page"), "{good}");
            for (request, status) in [
                ("GET / HTTP/1.0\r\n\r\n", "404"),
                ("POST /metrics HTTP/1.0\r\n\r\n", "405"),
                ("GET /metrics HTTP/1.1\r\nhost: rebound.example.com:9100\r\n\r\n", "403"),
                ("nonsense\r\n\r\n", "400"),
                ("GET /metrics HTTP/1.1\r\nHost: [::1]:1\r\n\r\n", "200"),
                ("HEAD /metrics HTTP/1.0\r\n\r\n", "200"),
            ] {
                let answer = ask(&address, request);
                assert!(answer.starts_with(&format!("HTTP/1.0 {status} ")), "{request}: {answer}");
            }
            assert_eq!(ask(&address, &"x".repeat(20_000)), "");
        }
        assert!(!path.exists());
    }
}
