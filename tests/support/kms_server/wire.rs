//! Requests and responses of HTTP/1.1 with known lengths: what the SDK sends and what servers of KMS answer.

use std::io::{self, BufRead, Read};

const MAX_LINE: u64 = 64 << 10;
const MAX_BODY: u64 = 1 << 20;

/// A request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    /// `POST` for all that KMS offers.
    pub method: String,
    /// With the query.
    pub path: String,
    /// In order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The whole body.
    pub body: Vec<u8>,
    /// Whether the client wants the connection closed after the answer.
    pub is_last: bool,
}

impl Request {
    /// The next request, or `None` if the client is done.
    pub(crate) fn read(reader: &mut impl BufRead) -> io::Result<Option<Self>> {
        let Some(line) = line(reader)? else { return Ok(None) };
        let mut words = line.split(' ');
        let [method, path, version] = [(); 3].map(|()| words.next().unwrap_or_default().to_owned());
        let headers = headers(reader)?;
        let length = header(&headers, "content-length").unwrap_or("0");
        let body = body(reader, length.parse().map_err(|_| malformed("a length"))?)?;
        let is_last = version != "HTTP/1.1" || closes(&headers);
        Ok(Some(Self { method, path, headers, body, is_last }))
    }

    /// The value of a header, by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The operation of KMS that it asks for.
    pub(crate) fn operation(&self) -> Option<&str> {
        self.header("x-amz-target")?.strip_prefix("TrentService.")
    }

    /// As it goes over the wire.
    pub(crate) fn encode(&self) -> Vec<u8> {
        encode(&format!("{} {} HTTP/1.1", self.method, self.path), &self.headers, &self.body)
    }
}

/// A response.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    /// The status.
    pub status: u16,
    /// In order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Response {
    /// An answer as KMS gives it.
    pub(crate) fn new(status: u16, request_id: &str, body: Vec<u8>) -> Self {
        let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amzn-requestid", request_id)];
        let mut response =
            Self { status, headers: headers.map(|(n, v)| (n.to_owned(), v.to_owned())).to_vec(), body: Vec::new() };
        response.set_body(body);
        response
    }

    /// The next response.
    pub(crate) fn read(reader: &mut impl BufRead) -> io::Result<Self> {
        let line = line(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| malformed("a status"))?;
        let headers = headers(reader)?;
        let body = match header(&headers, "content-length").map(str::parse) {
            Some(Ok(length)) => body(reader, length)?,
            Some(Err(_)) => return Err(malformed("a length")),
            None => {
                let mut body = Vec::new();
                reader.take(MAX_BODY).read_to_end(&mut body)?;
                body
            }
        };
        Ok(Self { status, headers, body })
    }

    /// Replaces the body, and its length.
    pub(crate) fn set_body(&mut self, body: Vec<u8>) {
        self.headers.retain(|(name, _)| name != "content-length");
        self.headers.push(("content-length".to_owned(), body.len().to_string()));
        self.body = body;
    }

    /// The value of a header, by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// Whether the server closes the connection after it.
    pub(crate) fn is_last(&self) -> bool {
        closes(&self.headers) || self.header("content-length").is_none()
    }

    /// As it goes over the wire.
    pub(crate) fn encode(&self) -> Vec<u8> {
        encode(&format!("HTTP/1.1 {} Answer", self.status), &self.headers, &self.body)
    }
}

fn encode(first_line: &str, headers: &[(String, String)], body: &[u8]) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    [first_line.as_bytes(), b"\r\n", headers.as_bytes(), b"\r\n", body].concat()
}

/// A line without its end, or `None` at the end of the stream.
fn line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    match reader.take(MAX_LINE).read_line(&mut line)? {
        0 => Ok(None),
        _ => line.strip_suffix("\r\n").map(|line| Some(line.to_owned())).ok_or_else(|| malformed("a line")),
    }
}

fn headers(reader: &mut impl BufRead) -> io::Result<Vec<(String, String)>> {
    let mut headers = Vec::new();
    loop {
        let line = line(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if line.is_empty() {
            return Ok(headers);
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed("a header"))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn body(reader: &mut impl BufRead, length: u64) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    match reader.take(length.min(MAX_BODY)).read_to_end(&mut body)? as u64 {
        read if read == length => Ok(body),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

fn closes(headers: &[(String, String)]) -> bool {
    header(headers, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} is malformed"))
}
