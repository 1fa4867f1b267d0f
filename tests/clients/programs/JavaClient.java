// Java's own HTTP client as it is: it asks to upgrade to HTTP/2, and its answers are read line by line.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.Collectors;

public class JavaClient {
    static final HttpClient CLIENT = HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(20)).build();
    static final String WEATHER = "{'type':'function','function':{'name':'weather','parameters':{'type':'object',"
        + "'properties':{'city':{'type':'string'}},'required':['city']}}}";
    static final String SCHEMA = "{'type':'json_schema','json_schema':{'name':'place','strict':true,'schema':{'type':"
        + "'object','properties':{'city':{'type':'string'},'country':{'type':'string'}},'required':['city','country'],"
        + "'additionalProperties':false}}}";
    static String url;
    static String model;

    interface Case {
        void run() throws Exception;
    }

    static HttpRequest request(String messages, String more) {
        String body = "{'model':'" + model + "','messages':[" + messages + "]" + more + "}";
        return HttpRequest.newBuilder(URI.create(url + "/chat/completions"))
            .header("Content-Type", "application/json")
            .timeout(Duration.ofSeconds(120))
            .POST(HttpRequest.BodyPublishers.ofString(body.replace('\'', '"')))
            .build();
    }

    static String user(String text) {
        return "{'role':'user','content':'" + text + "'}";
    }

    static HttpResponse<String> send(String messages, String more) throws Exception {
        return CLIENT.send(request(messages, more), HttpResponse.BodyHandlers.ofString());
    }

    static void check(String text, String part) {
        if (!text.contains(part)) {
            throw new AssertionError(text.substring(0, Math.min(500, text.length())) + " has no " + part);
        }
    }

    static void chat() throws Exception {
        HttpResponse<String> answer = send(user("hello"), "");
        check("" + answer.statusCode(), "200");
        check(answer.body(), "\"content\":\"Hello, world.\"");
    }

    static void stream() throws Exception {
        HttpRequest request = request(user("hello"), ",'stream':true");
        var lines = CLIENT.send(request, HttpResponse.BodyHandlers.ofLines()).body().collect(Collectors.toList());
        check(lines.get(lines.size() - 2), "data: [DONE]");
        check(String.join("", lines), "Hello");
    }

    static void tools() throws Exception {
        String tools = ",'stream':true,'tools':[" + WEATHER + "]";
        HttpRequest request = request(user("weather"), tools);
        String first = CLIENT.send(request, HttpResponse.BodyHandlers.ofLines()).body().collect(Collectors.joining());
        check(first, "\"name\":\"weather\"");
        check(first, "{\\\"city\\\": \\\"Paris\\\"}");
        check(first, "\"finish_reason\":\"tool_calls\"");
        String id = first.replaceAll("(?s).*\"tool_calls\":\\[\\{\"index\":0,\"id\":\"([^\"]+)\".*", "$1");
        String call = "{'role':'assistant','content':null,'tool_calls':[{'id':'" + id + "','type':'function',"
            + "'function':{'name':'weather','arguments':'{}'}}]},{'role':'tool','tool_call_id':'" + id
            + "','content':'21'}";
        check(send(user("weather") + "," + call, tools.replace("'stream':true,", "")).body(), "It is 21 degrees in Paris.");
    }

    static void schema() throws Exception {
        check(send(user("where?"), ",'response_format':" + SCHEMA).body(), "{\\\"city\\\": \\\"Paris\\\"");
    }

    static void overflow() throws Exception {
        HttpResponse<String> answer = send(user("word ".repeat(6000)), "");
        check("" + answer.statusCode(), "400");
        check(answer.body(), "context_length_exceeded");
        check(send(user("word ".repeat(100)), "").body(), "Hello, world.");
    }

    static void cancel() throws Exception {
        HttpRequest request = request(user("count"), ",'stream':true");
        try (var body = CLIENT.send(request, HttpResponse.BodyHandlers.ofInputStream()).body()) {
            check(new String(body.readNBytes(2000)), "data: {");
        }
    }

    public static void main(String[] arguments) {
        url = arguments[0];
        model = arguments[1];
        List<String> passed = new ArrayList<>();
        List<String> failed = new ArrayList<>();
        String[] names = {"chat", "stream", "tools", "schema", "overflow", "cancel"};
        Case[] cases = {
            JavaClient::chat, JavaClient::stream, JavaClient::tools, JavaClient::schema, JavaClient::overflow,
            JavaClient::cancel,
        };
        for (int at = 0; at < cases.length; at++) {
            try {
                cases[at].run();
                passed.add("\"" + names[at] + "\"");
            } catch (Throwable error) {
                String why = error.toString().replace("\\", "/").replace("\"", "'").replace("\n", " ");
                failed.add("\"" + names[at] + "\":\"" + why + "\"");
            }
        }
        System.out.println("{\"version\":\"" + System.getProperty("java.version") + "\",\"passed\":["
            + String.join(",", passed) + "],\"failed\":{" + String.join(",", failed) + "}}");
        System.exit(0);
    }
}
